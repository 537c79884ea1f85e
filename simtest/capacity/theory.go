package capacity

import (
	"math"
	"time"
)

// WaitMD1 is the mean time that a message waits before a line that takes
// service for each, when they come at random, rate a second (M/D/1, by Pollaczek
// and Khinchine); infinite when more comes than goes.
func WaitMD1(rate float64, service time.Duration) time.Duration {
	load := rate * service.Seconds()
	if load >= 1 {
		return math.MaxInt64
	}
	return seconds(load * service.Seconds() / (2 * (1 - load)))
}

// Drain is the fluid limit: how long a line that was cut for a while takes until
// what waited is gone, when coming messages a second wait meanwhile and go on
// coming, and the line takes service for each; infinite when they are too many.
func Drain(cut time.Duration, coming float64, service time.Duration) time.Duration {
	if service <= 0 {
		return 0
	}
	going := 1 / service.Seconds()
	if coming >= going {
		return math.MaxInt64
	}
	return seconds(coming * cut.Seconds() / (going - coming))
}

// day is the share of a working day's mail that is written in each hour, in
// per cent: nearly all between 8 and 18, most before noon.
var day = [24]float64{.5, .5, .5, .5, .5, .5, .5, 3, 9, 12, 12, 10, 7, 9, 10, 9, 6, 4, 2, 1, 1, .7, .5, .3}

// Company is what an admin knows.
type Company struct {
	Offices   int
	People    int           // at each office
	Mail      float64       // messages that one of them writes on a working day, counted per recipient
	Size      float64       // bytes of one
	Inside    float64       // share of it that stays in its office, 0 to 1
	Outside   float64       // share that goes to the Internet; as much comes from there
	Bandwidth float64       // bits a second of each office's line, each way
	Latency   time.Duration // one way
	Cut       time.Duration
	Seed      uint64
}

// Answer is what the company asks for.
type Answer struct {
	Daily       float64       // messages that are written in the company on a day
	Busy        float64       // messages a second between offices in the busiest hour, all together
	Waiting     float64       // messages that wait, at most, after a cut of one office in the worst hours
	AtPeers     float64       // bytes that they need at each other office
	AtOffice    float64       // and at the one that is cut off
	Drain       time.Duration // until they are gone, by the fluid limit
	Line        float64       // load of an office's line in the busiest hour, 0 to 1
	Wait        time.Duration // mean wait before a line in the busiest hour (M/D/1)
	MasterRate  float64       // messages a second that the master passes in the busiest hour
	MasterDaily float64       // bytes of the Internet's mail a day, both ways
	Simulated   Outcome       // the message-level model, over the cut and until all is gone
	Thinned     bool          // it was played with a part of the offices' mail, too many as they are
}

// mostMessages is how many messages a model plays for one answer.
const mostMessages = 3e6

// Answer computes the answers.
func (c Company) Answer() Answer {
	var a Answer
	perOffice := float64(c.People) * c.Mail // a day
	away := perOffice * (1 - c.Inside - c.Outside)
	a.Daily = perOffice * float64(c.Offices)
	busiest := 0.0
	for _, share := range day {
		busiest = max(busiest, share/100/3600)
	}
	a.Busy = away * float64(c.Offices) * busiest
	out := c.Outside * perOffice * float64(c.Offices) // a day, from all offices, and as much in
	a.MasterRate, a.MasterDaily = 2*out*busiest, 2*out*Wire(c.Size)

	// The line of an office carries each way what it writes to others and its
	// Internet mail; the master's carries everybody's, so it is not the one asked.
	service := seconds(Wire(c.Size) * 8 / c.Bandwidth)
	rate := (away + c.Outside*perOffice) * busiest
	a.Line, a.Wait = rate*service.Seconds(), WaitMD1(rate, service)

	share, after := worst(c.Cut)
	oneWay := (away + c.Outside*perOffice) * share // messages each way in the cut
	a.Waiting = 2 * oneWay
	a.AtOffice = oneWay * (c.Size + 512)
	a.AtPeers = a.AtOffice / float64(max(1, c.Offices-1))
	coming := (away + c.Outside*perOffice) * after / 3600
	a.Drain = Drain(c.Cut, oneWay/max(c.Cut.Seconds(), 1), service)
	if going := 1 / service.Seconds(); coming < going { // what comes after the cut is another hour's mail
		a.Drain = seconds(oneWay/(going-coming)) + reconnect
	}
	m := Model{Seed: c.Seed, Offices: c.Offices, Rate: oneWay / max(c.Cut.Seconds(), 1), Size: c.Size, Bandwidth: c.Bandwidth, Latency: c.Latency,
		Length: c.Cut + min(max(2*a.Drain, 10*time.Minute), 24*time.Hour), Cut: true, To: c.Cut}
	if most := mostMessages / (m.Rate * m.Length.Seconds()); float64(m.Offices) > most {
		m.Offices, a.Thinned = int(max(2, most)), true
	}
	a.Simulated = m.Run()
	return a
}

// worst is the share of a day's mail in the worst time of this length, and that
// of the hour after it. Days follow each other.
func worst(d time.Duration) (share, after float64) {
	hours := d.Hours()
	for begin := range 24 {
		sum, left, h := 0.0, hours, begin
		for ; left > 0; h++ {
			sum += day[h%24] / 100 * min(left, 1)
			left--
		}
		if sum > share {
			share, after = sum, day[h%24]/100
		}
	}
	return share, after
}
