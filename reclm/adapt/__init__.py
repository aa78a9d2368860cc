"""Smaller models and models for other data: quantization and adapters. Nothing else needs this room, and
without its flags it changes nothing."""
