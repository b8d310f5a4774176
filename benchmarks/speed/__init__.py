"""How long do a step, a decision and a compilation take?"""
