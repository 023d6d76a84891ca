"""What runs inside the processes of a rehearsed command, and writes down what it sees.

These modules are loaded by `startup/sitecustomize.py` into whatever Python the command starts.
They import nothing of memfit's, touch torch only once the script has imported it, and change
nothing that a script can see. What they write (`journal`) is read by `memfit.rehearsal.journals`.
"""
