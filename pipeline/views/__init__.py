"""What people read: the plan of a run, its summary, its log and its batches."""
