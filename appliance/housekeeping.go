package appliance

import (
	"context"
	"errors"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/transport"
)

// Housekeeping of the store: checkpoints and compaction while the node runs,
// and once a night a look at every byte of the index.
const (
	// tidyEvery is how often the log's growth is looked at: reading the names in
	// one folder.
	tidyEvery = 10 * time.Minute
	tidyFirst = time.Minute // after the start, so that figures are there
	// tidyRate bounds what housekeeping reads and writes beside the node's work,
	// in bytes a second: a tenth of a slow disk.
	tidyRate = 16 << 20
	// nightHour is the local hour from which on, once a day, the index is
	// verified and a checkpoint is written also when little has changed.
	nightHour   = 3
	nightGrowth = 1 << 20
)

// housekeep runs until ctx ends.
func (n *Node) housekeep(ctx context.Context) error {
	log := n.part("store")
	t := time.NewTimer(tidyFirst)
	defer t.Stop()
	night := nextNight(n.env.Now())
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		opt := journal.TidyOptions{Rate: tidyRate}
		var come bool
		if come, night = nightCome(night, n.env.Now()); come {
			opt.Growth = nightGrowth
			if err := n.journal.Verify(ctx); err != nil && ctx.Err() == nil {
				log.Error("verify the index", "err", err) // there is a condition for it
			}
		}
		_, err := n.journal.Tidy(ctx, opt)
		switch {
		case err == nil, ctx.Err() != nil:
		case errors.Is(err, transport.ErrNoSpace), errors.Is(err, kv.ErrNoSpace):
			log.Warn("the disk is too full to tidy the store", "err", err)
		default:
			log.Error("tidy the store", "err", err)
		}
		n.showStore()
		t.Reset(tidyEvery)
	}
}

// nightCome reports whether the night that was waited for has come, and returns
// the next one: after it, or after now when the clock was set back. A night is
// never more than a day (of 25 hours, once a year) away.
func nightCome(night, now time.Time) (come bool, next time.Time) {
	if now.Before(night) && night.Sub(now) <= 25*time.Hour {
		return false, night
	}
	return !now.Before(night), nextNight(now)
}

// nextNight returns the first time after now at which the clock shows nightHour.
func nextNight(now time.Time) time.Time {
	at := time.Date(now.Year(), now.Month(), now.Day(), nightHour, 0, 0, 0, now.Location())
	if !at.After(now) {
		at = at.AddDate(0, 0, 1)
	}
	return at
}
