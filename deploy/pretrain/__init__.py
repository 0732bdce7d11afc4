"""Making the shipped tiny model from nothing: scenes, autoencoder, latents, transformer, export."""
