"""The quantization methods, one file each; `suite.method` finds them by name."""
