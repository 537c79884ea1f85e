package processes

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// disk is a small ext4 disk that can lose its power. Its image lies on a file
// system of its own, which is frozen at the cut: from that instant nothing
// reaches the image any more, also not what the kernel had begun to write. And
// it is mounted so that nothing that was not synced reaches the image by itself
// before: no timed commit, no timed writeback, no ordering of data before
// metadata, no flush by renaming.
type disk struct {
	t     *testing.T
	dir   string // where it is mounted
	outer string // mount point of the file system that holds the image
	spare string // a folder outside of it
	image string
	n     int
}

const diskSize = 512 << 20 // bytes

// newDisk makes a disk, mounts it at dir and takes it away with the test. Only
// root can.
func newDisk(t *testing.T, dir string) *disk {
	t.Helper()
	holdWriteback(t)
	spare, err := os.MkdirTemp(memoryFolder(), "posthouse-disk-")
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, dir: dir, spare: spare, outer: filepath.Join(spare, "outer")}
	t.Cleanup(func() {
		exec.Command("fsfreeze", "-u", d.outer).Run() // in case the test ended in a cut
		d.unmount(d.dir)
		d.unmount(d.outer)
		os.RemoveAll(spare)
	})
	if err := os.MkdirAll(d.outer, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	makeFS(t, filepath.Join(spare, "outer.img"), 3*diskSize)
	run(t, "mount", "-o", "loop", filepath.Join(spare, "outer.img"), d.outer)
	d.image = filepath.Join(d.outer, "0.img")
	makeFS(t, d.image, diskSize)
	d.mount()
	return d
}

// memoryFolder is where images lie: in memory if there is such a folder.
func memoryFolder() string {
	if fi, err := os.Stat("/dev/shm"); err == nil && fi.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func makeFS(t *testing.T, image string, size int64) {
	t.Helper()
	f, err := os.Create(image)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	run(t, "mkfs.ext4", "-q", "-m", "0", image)
}

// holdWriteback keeps the kernel from writing back by the clock until the test
// ends.
func holdWriteback(t *testing.T) {
	t.Helper()
	for name, value := range map[string]string{"dirty_writeback_centisecs": "0", "dirty_expire_centisecs": "360000"} {
		path := filepath.Join("/proc/sys/vm", name)
		was, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.WriteFile(path, was, 0) })
	}
}

func (d *disk) mount() {
	d.t.Helper()
	run(d.t, "mount", "-o", "loop,commit=300,data=writeback,noauto_da_alloc,noinit_itable", d.image, d.dir)
}

func (d *disk) unmount(dir string) {
	for range 100 {
		out, err := exec.Command("umount", dir).CombinedOutput()
		if err == nil || bytes.Contains(out, []byte("not mounted")) || bytes.Contains(out, []byte("no mount point")) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	d.t.Errorf("%s cannot be unmounted", dir)
}

// cut takes the power away: what the image holds at this instant is all that
// there is afterwards. It calls kill, which has to end whoever uses the disk,
// but may not wait for it: it may hang in the disk until cut has the copy.
func (d *disk) cut(kill func(), gone func() bool) {
	d.t.Helper()
	run(d.t, "fsfreeze", "-f", d.outer)
	kill()
	kept := filepath.Join(d.spare, "kept.img")
	run(d.t, "cp", "--sparse=always", d.image, kept)
	run(d.t, "fsfreeze", "-u", d.outer)
	for end := time.Now().Add(20 * time.Second); !gone(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatal("the node does not die")
		}
	}
	d.unmount(d.dir)
	if err := os.Remove(d.image); err != nil {
		d.t.Fatal(err)
	}
	d.n++
	d.image = filepath.Join(d.outer, strconv.Itoa(d.n)+".img")
	run(d.t, "cp", "--sparse=always", kept, d.image)
	if err := os.Remove(kept); err != nil {
		d.t.Fatal(err)
	}
	d.mount()
}

// free is how many bytes are left.
func (d *disk) free(t *testing.T) int64 {
	t.Helper()
	var s syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &s); err != nil {
		t.Fatal(err)
	}
	return int64(s.Bavail) * s.Bsize
}

// fill has another process write until the disk is full, and returns how to
// give the space back. What it writes lies in a file of that name. ext4 gives
// freed blocks back with its next commit: it is full when nothing came after one.
func (d *disk) fill(name string) (release func()) {
	d.t.Helper()
	file := filepath.Join(d.dir, name)
	for range 20 {
		out, err := exec.Command("dd", "if=/dev/zero", "of="+file, "bs=64k", "oflag=append", "conv=notrunc").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "No space left") {
			d.t.Fatalf("dd did not fill the disk: %v %s", err, out)
		}
		run(d.t, "sync", "-f", d.dir)
		if d.free(d.t) == 0 {
			break
		}
	}
	return func() {
		if err := os.Remove(file); err != nil {
			d.t.Fatal(err)
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// asRoot ends a test that nobody else can make: only root mounts a disk.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount a disk to take its power away: run the tests as root")
	}
}

// running reports whether a process lives; one that hangs in a frozen disk does.
func running(pid int) bool {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && len(args) > 0
}

// onDisk moves an office's data folder to a disk of its own.
func (m *Mesh) onDisk(t *testing.T, office string) *disk {
	t.Helper()
	m.Kill(office)
	data := m.Node(office).Data
	if err := os.Rename(data, data+".was"); err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, data)
	t.Cleanup(func() { m.Command("demo", "kill", "--dir", m.Dir, office) }) // before the disk goes
	run(t, "cp", "-a", data+".was/.", data)
	if err := os.RemoveAll(data + ".was"); err != nil {
		t.Fatal(err)
	}
	run(t, "sync", "-f", data)
	m.Start(office)
	return d
}
