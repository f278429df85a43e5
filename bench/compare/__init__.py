"""Results of the bench side by side: two machines, two runs, or a run and published figures."""
