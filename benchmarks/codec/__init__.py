"""How far is a format's update from the exact one?"""
