package journal

import (
	"time"

	"posthouse/transport"
)

// Full reports whether nothing new should be begun: the disk is below its floor,
// or kept a record out a moment ago. What was begun is still written while it
// fits. Who is told so hears of room by Options.Space.
func (j *Journal) Full() bool {
	if j.view.Full() {
		j.noteShort()
	}
	return j.full.Load()
}

// refuse is Admit's answer to want of space.
func (j *Journal) refuse() error {
	j.noteShort()
	return transport.ErrNoSpace
}

// refusedByLog is called by the log's writer.
func (j *Journal) refusedByLog() {
	j.refusals.Add(1)
	j.noteShort()
}

func (j *Journal) noteShort() {
	j.full.Store(true)
	select {
	case j.short <- struct{}{}:
	default:
	}
}

// A disk is looked at again every spacePoll, and only while it is full. Where
// statfs promises room and writes still fail (a quota of the file system), each
// new "room" is believed later, up to spaceDoubt.
const (
	spacePoll  = time.Second
	spaceDoubt = 5 * time.Second
)

// watchSpace tells when the disk is full and when it has room again. It sleeps
// until something is refused.
func (j *Journal) watchSpace() {
	wait, last := spacePoll, time.Time{}
	for {
		select {
		case <-j.short:
		case <-j.done:
			return
		}
		if !j.full.Load() {
			continue // it was refused before the last "room" was told
		}
		if wait = min(2*wait, spaceDoubt); last.IsZero() || time.Since(last) > 4*spaceDoubt || j.view.Full() {
			wait = spacePoll
		}
		if j.space != nil {
			j.space(true)
		}
		for {
			had := j.refusals.Load()
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-j.done:
				t.Stop()
				return
			}
			if !j.view.Full() && j.refusals.Load() == had {
				break
			}
		}
		// Whoever is refused from here on makes a turn of its own.
		j.full.Store(false)
		last = time.Now()
		if j.space != nil {
			j.space(false)
		}
	}
}
