"""What a run will need before it is paid for: memory, time and money, of pretraining and of its evaluation."""
