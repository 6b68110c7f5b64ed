"""Foundation models of the ecosystem, and omni models assembled from any parts."""
