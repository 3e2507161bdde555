"""Post-training quantization methods compared on one protocol. Importing this registers the model `ptq` with lm-eval.

>>> import suite, lm_eval
>>> lm_eval.simple_evaluate(model="ptq", model_args="pretrained=...,method=gptq,wbits=4", ...)  # doctest: +SKIP
"""

# The table of lm-eval's own models is filled first: lm-eval fills it by itself only while it is empty.
import lm_eval.models  # noqa: F401
from lm_eval.api.registry import model_registry

# By name only, so that neither torch nor transformers is imported here. Later versions of lm-eval find the entry point
# of pyproject.toml by themselves.
if "ptq" not in model_registry:
    model_registry.register("ptq", target="suite.adapter:PTQ")
