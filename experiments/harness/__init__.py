"""The harness of all experiments: command line, studies, workers, links, tables, figures, records."""
