"""What pretraining and fine-tuning share: optimizer, precision, parallel ranks, checkpoints, faults, meters."""
