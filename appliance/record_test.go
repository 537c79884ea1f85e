package appliance

import (
	"testing"

	"posthouse/appliance/joining"
	"posthouse/mesh"
)

func TestARecordThatWasHandedOutDoesNotChange(t *testing.T) {
	k := newKeeper(DiskFiles(), t.TempDir())
	peers := []joining.Peer{{ID: 7, Key: mesh.KeyHash{1}}}
	if err := k.change(func(r *record) { r.Peers = peers }); err != nil {
		t.Fatal(err)
	}
	had := k.get()
	had.Peers[0].KeyHex = "as it was" // stands for what another goroutine reads
	if err := k.change(func(r *record) { r.Boots++ }); err != nil {
		t.Fatal(err)
	}
	if had.Peers[0].KeyHex != "as it was" {
		t.Error("a change wrote into a record that was handed out")
	}
	if now := k.get(); now.Boots != 1 || now.Peers[0].KeyHex != peers[0].Key.String() {
		t.Errorf("%+v", now)
	}
}
