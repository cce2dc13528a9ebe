"""Using a trained model: NIfTI in, label maps out; scores of anybody's label maps; features of the encoder."""
