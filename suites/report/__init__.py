"""What people read of a run: from results.json, and from the catalogue of defects.

read            results.json, held to its schema
laws            the columns: each law with its sentence
matrix          functions by laws, how many checks of each cell hold
answer          what the run says, in one sentence
matrix_text     the matrix as text, in the width of a terminal
terminal        the run on a terminal
compare         two runs side by side, as a table in Markdown
changes         two runs in terms of defects
slower          what costs more, where both runs measured
beside          what differs from the last run of another torch, at the end of a run
comparison      ci/compare
versions        torch's versions side by side: ci/verdicts
html            pages as single files: report.html, the comparison
page_command    ci/report
plugin          leaves report.html beside results.json
browser         the pages in Chromium
readme          ci/readme
__main__        `python -m report out/latest`: the matrix, the failures, the defects
"""
