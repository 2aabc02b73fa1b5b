"""`ezsd cache look`: a store's regions over its images, and what they find of objects that their filters do not know.

Base boxes are read, as in a build. Novel boxes of the training images are read where evaluation is asked for and
nowhere else, and nothing that is found goes back into a store or a training.
"""

from ezsd.pipeline.look.look import LookRequest, look_at_store

__all__ = ["LookRequest", "look_at_store"]
