// Package capacity answers how a mesh bears its mail: a message-level model (no
// packets, no nodes) for days and hundreds of offices, and the theory beside it.
//
// It is pure: numbers in, numbers out; equal seeds give equal runs. How far it
// can be trusted stands in simtest/DESIGN.md. posthouse-sim capacity calls it.
package capacity

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"
)

// What the relay costs on the wire and in time, measured at the packet level
// (TestTheModelAgreesWithPackets).
const (
	// Overhead is what a message costs on the wire beside its own bytes:
	// envelope, report of custody, answer, QUIC, UDP and IP.
	Overhead = 800
	// perPacket is the share of a large body that goes into headers.
	perPacket = 1.06
	// window is how many messages of one pair may be unanswered.
	window = 64
	// reconnect is how long after a heal the first message leaves, on average:
	// a peer that cannot be reached is dialled every three seconds, and the
	// connection finds out how much the line takes.
	reconnect = 3500 * time.Millisecond
)

// Wire is how many bytes a message of this size takes on a line.
func Wire(size float64) float64 { return size*perPacket + Overhead }

// Model is a mesh in which every office writes to every other.
type Model struct {
	Seed      uint64
	Offices   int
	Rate      float64       // messages a second that leave one office, to all others together
	Size      float64       // bytes of one
	Bandwidth float64       // bits a second of each office's line, each way; 0: no limit
	Latency   time.Duration // one way
	Length    time.Duration // of the time in which mail is written

	Cut      bool // whether office 0 is cut off
	From, To time.Duration
}

// Outcome is what a run of the model came to.
type Outcome struct {
	Messages int
	Mean     time.Duration // from written to there, of those not held up by the cut
	P99      time.Duration // of all
	Longest  time.Duration
	Waiting  int           // messages that waited for the cut office, at most
	Bytes    float64       // that they took on the senders' disks
	Drained  time.Duration // from the heal until nothing older than it waits
	Busiest  float64       // share of time that the busiest line up was in use
}

// event is a message that comes to its next place.
type event struct {
	at       float64 // seconds
	born     float64
	from, to int32
	place    int8 // 0: written, 1: at the sender's line, 2: at the recipient's line
}

type events []event

func (e events) Len() int           { return len(e) }
func (e events) Less(i, j int) bool { return e[i].at < e[j].at }
func (e events) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)        { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

// Run plays the model: messages are written at random (Poisson), wait for their
// office's line up, cross, and wait for the other's line down; each line takes
// one after the other, each for the same time. What concerns a cut office waits
// where it is, and goes in order when the line is back.
func (m Model) Run() Outcome {
	dice := rand.New(rand.NewPCG(m.Seed, 1))
	service := 0.0
	if m.Bandwidth > 0 {
		service = Wire(m.Size) * 8 / m.Bandwidth
	}
	pace := 2 * m.Latency.Seconds() / window // between two of one pair
	up, down := make([]float64, m.Offices), make([]float64, m.Offices)
	busy := make([]float64, m.Offices)
	pair := map[[2]int32]float64{}
	from, to := m.From.Seconds(), m.To.Seconds()
	var q events
	for o := range m.Offices {
		heap.Push(&q, event{at: dice.ExpFloat64() / m.Rate, from: int32(o)})
	}
	var out Outcome
	var took []float64
	var held []event
	sum, counted, drained := 0.0, 0, to
	end := m.Length.Seconds()
	healed := !m.Cut
	release := func() {
		healed = true
		for _, e := range held {
			e.at = to + reconnect.Seconds()
			heap.Push(&q, e)
		}
		out.Waiting, out.Bytes = len(held), float64(len(held))*(m.Size+512)
	}
	for len(q) > 0 || len(held) > 0 && !healed {
		if !healed && (len(q) == 0 || q[0].at >= to) {
			release()
		}
		e := heap.Pop(&q).(event)
		switch e.place {
		case 0:
			if next := e.at + dice.ExpFloat64()/m.Rate; next < end {
				heap.Push(&q, event{at: next, from: e.from})
			}
			e.to = int32(dice.IntN(m.Offices - 1))
			if e.to >= e.from {
				e.to++
			}
			e.born, e.place = e.at, 1
			if m.Cut && (e.from == 0 || e.to == 0) && e.at >= from && e.at < to {
				held = append(held, e)
				continue
			}
			heap.Push(&q, e)
		case 1:
			k := [2]int32{e.from, e.to}
			start := max(e.at, up[e.from], pair[k])
			up[e.from], pair[k] = start+service, start+pace
			busy[e.from] += service
			e.at, e.place = start+service+m.Latency.Seconds(), 2
			heap.Push(&q, e)
		case 2:
			// Packets of one message flow through both lines at once: the second
			// line adds its time only where it has to wait.
			done := max(e.at, down[e.to]+service)
			down[e.to] = done
			d := done - e.born
			took = append(took, d)
			if !(m.Cut && (e.from == 0 || e.to == 0)) {
				sum += d
				counted++
			}
			if m.Cut && e.born < to && (e.from == 0 || e.to == 0) {
				drained = max(drained, done)
			}
		}
	}
	slices.Sort(took)
	out.Messages = len(took)
	if n := len(took); n > 0 {
		out.P99, out.Longest = seconds(took[n*99/100]), seconds(took[n-1])
	}
	if counted > 0 {
		out.Mean = seconds(sum / float64(counted))
	}
	if m.Cut {
		out.Drained = seconds(drained - to)
	}
	out.Busiest = slices.Max(busy) / max(end, 1)
	return out
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
