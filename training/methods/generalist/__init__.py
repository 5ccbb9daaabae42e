"""The generalist method: "A Simple and Generalist Approach for Panoptic Segmentation" (G)."""
