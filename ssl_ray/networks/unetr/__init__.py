"""The networks of the recipe: a ViT of 16³ tokens, pretrained in ViTAutoEnc, segments in UNETR."""
