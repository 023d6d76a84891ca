"""The watch: it runs inside the processes of a rehearsed command, and records what happens.

`startup/sitecustomize.py` loads these modules into every Python that the command starts. They do
not import other modules of memfit. They use torch only after the script has imported it, and they
change nothing that a script can see. `journal` writes the records, and `memfit.rehearsal.journals`
reads them.
"""
