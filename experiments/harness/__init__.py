"""What the experiments have in common: command line, studies, workers, links, tables, figures, records."""
