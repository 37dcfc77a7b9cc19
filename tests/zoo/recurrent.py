"""Recurrent layers and cells, and what stands around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.registry import network, tokens


@network("speech_gru", (5, 16))
class Speech(nn.Module):
    """A strided Conv1d and a batch norm, then a GRU of two layers in both directions, scores at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(5, 9, 5, stride=2, padding=2), nn.BatchNorm1d(9), nn.ReLU())
        self.rnn = nn.GRU(9, 8, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.conv(x).transpose(1, 2))
        return self.fc(y)


@network("text_bilstm", inputs=lambda batch: ((tokens(batch, 6, 11),), {}))
class Text(nn.Module):
    """An embedding, an LSTM in both directions, attention over its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 10)
        self.lstm = nn.LSTM(10, 7, bidirectional=True, batch_first=True)
        self.score = nn.Sequential(nn.Linear(14, 5), nn.Tanh(), nn.Linear(5, 1))
        self.fc = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(x))
        return self.fc((self.score(y).softmax(1) * y).sum(1))


@network("last_states", (6, 5))
class LastStates(nn.Module):
    """A classifier on the last states of both directions: one tensor holds those of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True)
        self.fc2 = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(self.fc1(x).transpose(0, 1))
        return self.fc2(torch.cat((h[-2], h[-1]), 1))


@network("projected_lstm", (6, 5))
class Projected(nn.Module):
    """An LSTM that puts out fewer values than it has units; torch knows it by these two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 9, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


@network("seq2seq", inputs=lambda batch: ((tokens(batch, 6, 11), tokens(batch, 4, 11)), {}))
class Translator(nn.Module):
    """The decoder begins with the encoder's last states, and shares its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.LSTM(8, 7, num_layers=2, batch_first=True)
        self.decoder = nn.LSTM(8, 7, num_layers=2, batch_first=True)
        self.fc = nn.Linear(7, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, states = self.encoder(self.embedding(source))
        return self.fc(self.decoder(self.embedding(target), states)[0])


@network("learned_state", (6, 5))
class LearnedState(nn.Module):
    """A GRU that begins with a parameter, expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Parameter(torch.zeros(2, 1, 7))
        self.gru = nn.GRU(5, 7, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x, self.begin.expand(-1, x.size(0), -1).contiguous())
        return self.fc(y[:, -1])


@network("lstm_cell_loop", (4, 5))
class CellLoop(nn.Module):
    """Two stacked LSTM cells over the time steps, the upper one from zeros made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.low, self.high = nn.LSTMCell(6, 8), nn.LSTMCell(8, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        low, outputs = None, []
        high = (torch.zeros(x.size(0), 7, dtype=x.dtype), torch.zeros(x.size(0), 7, dtype=x.dtype))
        for step in x.unbind(1):
            low = self.low(self.fc1(step), low)
            high = self.high(low[0], high)
            outputs.append(high[0])
        return self.fc2(torch.stack(outputs, 1))


@network("summed_directions", (6, 5))
class SummedDirections(nn.Module):
    """Both directions are added, halved at a literal, and a residual goes around the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(5, 8, num_layers=2, bidirectional=True, nonlinearity="relu", batch_first=True)
        self.gru, self.cell = nn.GRU(8, 8, batch_first=True), nn.GRUCell(8, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        y = y[..., :8] + y[..., 8:]
        y = y + self.gru(y)[0]
        return self.fc(self.cell(y[:, -1]))
