"""Train, fine-tune and convert Nemotron Nano V2 VL class models on megatron-core."""

__version__ = "0.1.0"
