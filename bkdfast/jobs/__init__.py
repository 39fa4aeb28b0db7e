"""Long work in resumable units: a folder of finished units (`store`), and processes that share them (`units`).

Nothing here knows what a unit computes; sweeps and delta SVDs are built on it.
"""
