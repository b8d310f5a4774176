"""Are the bits those of one device, and of a run that nobody disturbed?"""
