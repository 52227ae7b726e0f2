"""A local vision-language model answers a robot in movement phrases it cannot get wrong."""

__version__ = "0.2.0"
