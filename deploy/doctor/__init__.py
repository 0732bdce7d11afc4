"""What can run here, row by row: the machine, Ray, the cluster, the recipe, its models."""
