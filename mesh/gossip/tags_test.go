package gossip

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"posthouse/mesh"
)

func TestTagsAreReadAsTheyWereTold(t *testing.T) {
	want := Tags{Version: "1.2.3", State: mesh.Serving, Boot: 9, Digests: map[string]uint64{"pub": 5, "stats": 1 << 63}}
	m, err := want.encode()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, decodeTags(m)); diff != "" {
		t.Error(diff)
	}
}

func TestForeignTagsThatMakeNoSenseAreLeftOut(t *testing.T) {
	got := decodeTags(map[string]string{
		"v": "1", "b": "-1", "d.pub": "many", "d." + strings.Repeat("x", 100): "1", "later": "?", "s": strings.Repeat("y", 100),
	})
	if diff := cmp.Diff(Tags{Version: "1"}, got); diff != "" {
		t.Error(diff)
	}
}
