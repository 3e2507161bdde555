"""Ablations: experiments as data (`experiments/*.yaml`), the studies that no grid can express, and their runs."""
