"""Restoration pretraining: plan, stream, corruption and the distributed loop."""
