package processes

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWhatAProcessLeavesOpenIsSeen(t *testing.T) {
	start := []string{"/dev/null", "/m/hq.log", "anon_inode:[eventpoll]", "socket:[1]", "socket:[2]",
		"/m/hq/log/000000000001.seg", "/m/hq/log/000000000001.seg", "/m/hq/view/db", "/m/hq/view/db/00001.mem"}
	fresh := holdOf(start, "/m/hq")
	for _, tt := range []struct {
		name string
		more []string
		want []string
	}{
		{"nothing more", nil, nil},
		{"the store has grown", []string{"/m/hq/log/000000000002.seg", "/m/hq/log/000000000003.body", "/m/hq/view/db/000004.sst"}, nil},
		{"a connection", []string{"socket:[3]"}, []string{"3 sockets, 2 after a start"}},
		{"a pipe", []string{"pipe:[3]"}, []string{"4 other things, 3 after a start"}},
		{"a segment that nobody writes any more, twice", []string{"/m/hq/log/000000000002.seg", "/m/hq/log/000000000002.seg"}, []string{"twice log/000000000001.seg and log/000000000002.seg"}},
		{"a segment three times", []string{"/m/hq/log/000000000001.seg"}, []string{"log/000000000001.seg 3 times"}},
		{"a table twice", []string{"/m/hq/view/db/00001.mem"}, []string{"view/db/00001.mem 2 times"}},
		{"a file that was removed", []string{"/m/hq/log/000000000007.body (deleted)"}, []string{"log/000000000007.body (deleted)"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := holdOf(slices.Concat(start, tt.more), "/m/hq")
			if d := cmp.Diff(tt.want, h.above(fresh)); d != "" {
				t.Error(d)
			}
		})
	}
}
