"""Blocks of the literature, each built small from its paper, and what the passes owe each."""
