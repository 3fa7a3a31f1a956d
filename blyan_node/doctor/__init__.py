"""`doctor`: checks with a verdict each, and for whatever is wrong the reason and the next step.

`judging` are pure functions from what was seen to a `Finding`; `within` looks from inside a node
that runs, `outside` at a home whether its node runs or not, and `verb` puts the two together.
"""
