"""What a run stands on: files, processes, logs, counting, evaluation. Nothing here knows the model, the predictor or
the run: what it needs of them it gets as arguments. (config/, data/, kernels.py and sparse.py lie below.)"""
