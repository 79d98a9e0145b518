"""The sub-commands of `fovea`: one module for each command or small group."""
