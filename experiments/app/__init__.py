"""Parts of the main job: train.py, evaluate.py, report.py."""
