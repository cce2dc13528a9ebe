"""Self-supervised pretraining: what is learned (`tasks`), on which samples, and Ray's workers that do it."""
