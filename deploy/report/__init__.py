"""What people look at: report.html of a run, preview.html before a run, contact sheets. Reads files only, draws no conclusions twice."""
