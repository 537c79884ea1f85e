package appliance

import (
	"testing"
	"time"
)

func TestANightComesOnceADayWhateverIsDoneToTheClock(t *testing.T) {
	at := func(day, hour int) time.Time { return time.Date(2026, time.November, day, hour, 0, 0, 0, time.UTC) }
	for _, tc := range []struct {
		name       string
		night, now time.Time
		come       bool
		next       time.Time
	}{
		{"in the evening", at(24, 3), at(23, 22), false, at(24, 3)},
		{"at night", at(24, 3), at(24, 3), true, at(25, 3)},
		{"set ahead by years", at(24, 3), at(24, 3).AddDate(9, 0, 0), true, at(25, 3).AddDate(9, 0, 0)},
		{"set back by years", at(24, 3), at(22, 22).AddDate(-9, 0, 0), false, at(23, 3).AddDate(-9, 0, 0)},
		{"set back by an hour at night", at(25, 3), at(24, 2), false, at(25, 3)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if come, next := nightCome(tc.night, tc.now); come != tc.come || !next.Equal(tc.next) {
				t.Errorf("come: %v, then %v; want %v, %v", come, next, tc.come, tc.next)
			}
		})
	}
}
