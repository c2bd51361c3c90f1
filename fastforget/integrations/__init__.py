"""Adapters to training frameworks: the Trainer of transformers, and trainers derived from it."""
