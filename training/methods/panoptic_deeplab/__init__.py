"""Panoptic-DeepLab (Cheng et al., CVPR 2020; D below), and PISR on top of it where the config asks for it."""
