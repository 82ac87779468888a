"""Config to objects: one file per `iskd COMMAND`, each with a `main`, and `iskd.compress`.

The only room that knows Hydra. Its face is the command line, and `iskd` itself hands on `compress`. Nothing is imported
here: a command pays for its own imports only.
"""
