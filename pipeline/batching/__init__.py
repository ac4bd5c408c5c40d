"""The method: clusters, batches, masks and their hardness. Arrays in, arrays out."""
