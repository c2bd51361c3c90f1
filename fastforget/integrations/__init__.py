"""Adapters to training frameworks (HF Trainer, TRL, Accelerate); empty until their issue."""
