"""What the runs of a study cost and show: ledger, paired differences, crossings, break-even. All of it is pure."""
