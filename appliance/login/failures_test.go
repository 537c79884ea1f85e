package login

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func TestEachFailureWaitsTwiceAsLong(t *testing.T) {
	var f Failures
	now := time.Unix(1e9, 0)
	here, neighbour := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff")
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 16} {
		if got := f.Failed(here, "Anna", now); got != want*time.Second {
			t.Errorf("failure %d waits %v", i+1, got)
		}
	}
	if got := f.Failed(neighbour, "anna", now); got != longDelay {
		t.Errorf("another address of the same network waits %v", got)
	}
	if got := f.Failed(here, "boris", now); got != firstDelay {
		t.Errorf("another user waits %v", got)
	}
	if got := f.Failed(here, "anna", now.Add(failureLife+1)); got != firstDelay {
		t.Errorf("a quarter of an hour later: %v", got)
	}
	f.Succeeded(here, "boris")
	if got := f.Failed(here, "boris", now); got != firstDelay {
		t.Errorf("after the right password: %v", got)
	}
	for i := range 2 * maxFailures {
		f.Failed(here, fmt.Sprint(i), now.Add(time.Duration(i)))
	}
	if len(f.of) > maxFailures {
		t.Errorf("%d pairs are remembered", len(f.of))
	}
}
