"""One module a backend: available() and rejects(problem) say why not, forward and backward compute."""
