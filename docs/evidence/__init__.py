"""Which recorded run stands behind each figure of the documentation: `python docs/evidence` writes docs/performance.md.

A figure is written down once, as a claim: a statement, the record it comes from, and how it is read from there. From
the claims comes the page; and wherever else a figure is quoted, its words are compared with the record.
"""
