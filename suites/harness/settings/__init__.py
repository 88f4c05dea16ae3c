"""What a run is asked for: the subject, the command line, and the marks of a check.

subjects          the import root of an implementation, and its functions by upstream's names
subject_warnings  warnings that the subject issues: collected, and judged
subject_import    what is known of a subject before any rank starts
options           the command line, checked before anything starts
requirements      what a check's marks ask for, and whether this run can give it
"""
