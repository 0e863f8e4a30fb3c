"""What snapshot tests of rewritten graphs compare."""
