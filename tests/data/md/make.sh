# Runs in the guest: makes arrays of many kinds one after the other and keeps their metadata.
# $DISKS are eight disks of 33000 sectors. What is said about them goes into text/.
set -u
here=/run/repo/tests/data/md
mkdir -p text
set -- $DISKS
a=$1 b=$2 c=$3 d=$4 e=$5 f=$6 g=$7 h=$8
create() { mdadm --create /dev/md0 --run --homehost='<none>' --name=golden "$@"; }
keep() { python3 -I $here/collect.py /run/w/kept.jsonl "$@"; }
examine() { # NAME DEVICE: the superblock as mdadm prints it, and the metadata itself
    mdadm --examine $2 >text/$1.examine 2>&1
    mdadm --examine --export $2 >text/$1.export 2>&1
    keep $1 $2
}
bitmap() { mdadm -X $2 >text/$1.bitmap 2>&1; }
idle() { i=0; while grep -Eq 'resync|recovery|reshape' /proc/mdstat && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done; }
clean() {
    mdadm --stop /dev/md0 || cat /proc/mdstat
    for disk in $DISKS; do
        dd if=/dev/zero of=$disk bs=64K count=40
        dd if=/dev/zero of=$disk bs=512 seek=32000 count=1000
    done
}
fill() { # SECTOR COUNT: letters, which take little room when they are kept
    tr '\0' K </dev/zero | dd of=/dev/md0 bs=512 seek=$1 count=$2 iflag=fullblock oflag=direct
}

create -e 1.2 -l 1 -n 2 --assume-clean --bitmap=internal --bitmap-chunk=64K --delay=7 \
    --write-mostly $b --uuid=01234567:89abcdef:fedcba98:76543210 $a
examine raid1-new $a
mdadm /dev/md0 --fail $b
fill 100 8; fill 5000 200; fill 28000 1
mdadm --stop /dev/md0
examine raid1-degraded $a
bitmap raid1-degraded $a
examine raid1-stale $b
clean

create -e 1.0 -l 5 -n 3 -x 1 --bitmap=internal --bitmap-chunk=4K -c 64 $a $b $c $d
idle; fill 10 300
mdadm --stop /dev/md0
examine raid5-1.0 $b; bitmap raid5-1.0 $b
examine raid5-1.0-spare $d
clean

create -e 1.1 -l 6 -n 5 --layout=ddf-zero-restart -c 16 --bitmap=internal $a $b $c $d $e
idle
mdadm --stop /dev/md0
examine raid6-1.1 $c; bitmap raid6-1.1 $c
clean

create -e 1.2 -l 10 -n 4 --layout=f2 -c 32 --bitmap=internal --bitmap-chunk=16K $a $b $c $d
idle
mdadm /dev/md0 --fail $d; fill 1000 64
mdadm --stop /dev/md0
examine raid10-1.2 $a; bitmap raid10-1.2 $a
clean

create -e 1.2 -l 0 -n 2 -c 8 $a $b
examine raid0-1.2 $a
clean

dmsetup create small --table "0 20000 linear $b 0"
create -e 1.2 -l 0 -n 2 -c 8 $a /dev/mapper/small
examine raid0-unequal $a
mdadm --stop /dev/md0; dmsetup remove small
clean

create -e 1.0 -l 1 -n 2 --assume-clean --bitmap=none --data-offset=1024K $a $b
mdadm --stop /dev/md0
examine raid1-1.0-offset $a
clean

create -e 1.2 -l 4 -n 3 -c 4 --bitmap=none --assume-clean $a missing $c
examine raid4-1.2 $c
clean

create -e 0.90 -l 5 -n 3 -x 1 -c 64 --bitmap=internal --bitmap-chunk=8K $a $b $c $d
idle; mdadm /dev/md0 --fail $c; idle; mdadm /dev/md0 --fail $d; fill 600 16
mdadm --stop /dev/md0
examine raid5-0.90 $b; bitmap raid5-0.90 $b
examine raid5-0.90-faulty $c
clean

create -e 0.90 -l 1 -n 2 --bitmap=none $a missing
mdadm --stop /dev/md0
examine raid1-0.90 $a
clean

create -e 1.2 -l 5 -n 3 -c 64 --consistency-policy=ppl $a $b $c
idle; fill 8 16; fill 2048 40; fill 128 8
mdadm --stop /dev/md0
for disk in $a $b $c; do examine ppl-1.2-$(basename $disk) $disk; keep ppl-1.2-log-$(basename $disk) $disk 0 1100; done
clean

create -e 1.0 -l 5 -n 3 -c 64 --consistency-policy=ppl $a $b $c
mdadm --stop /dev/md0
examine ppl-1.0 $b; keep ppl-1.0-log $b 14000
clean

create -e 1.2 -l 5 -n 3 -c 64 --write-journal $d $a $b $c
idle; mdadm --stop /dev/md0
examine journal-member $a; examine journal-device $d
clean

create -e 1.2 -l 1 -n 2 --assume-clean --bitmap=none $a $b
echo 2148 8 >/sys/block/md0/md/dev-$(basename $b)/bad_blocks
echo 4000 600 >/sys/block/md0/md/dev-$(basename $b)/bad_blocks
echo 30001 1 >/sys/block/md0/md/dev-$(basename $b)/bad_blocks
fill 0 1
mdadm --stop /dev/md0
mdadm --examine-badblocks $b >text/badblocks.list 2>&1
examine badblocks $b
clean

create -e 1.2 -l 1 -n 2 --assume-clean --bitmap=internal $a $b
echo 100 >/proc/sys/dev/raid/speed_limit_min; echo 100 >/proc/sys/dev/raid/speed_limit_max
mdadm /dev/md0 --fail $b; mdadm /dev/md0 --remove $b; mdadm /dev/md0 --add $c
sleep 0.5
mdadm --stop /dev/md0
examine recovering $c; examine recovering-source $a
clean

create -e 1.2 -l 1 -n 2 --assume-clean --failfast --bitmap=none $a $b
mdadm /dev/md0 --add $c; mdadm /dev/md0 --replace $a --with $c
sleep 0.5
examine replacement $c; examine replaced $a
clean

echo 200000 >/proc/sys/dev/raid/speed_limit_max

# dm-raid. Data devices are whole disks, metadata devices the last 2000 sectors of them.
n=0
for disk in $DISKS; do
    eval "dmsetup create m$n --table '0 2000 linear $disk 31000'"
    eval "dmsetup create d$n --table '0 30000 linear $disk 0'"
    n=$((n+1))
done
M=/dev/mapper
idle_raid() { i=0; while ! dmsetup status r | grep -q ' idle ' && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done; }
raid() { # NAME TABLE: load it, let it settle
    dmsetup create r --table "$2" || dmesg | tail -5
    idle_raid
    dd if=/dev/zero of=/dev/mapper/r bs=4096 seek=40 count=9 oflag=direct
}
settle() { # NAME DISKS...: suspend, so that all is written, keep, take down
    name=$1; shift
    dmsetup status r >text/$name.status; dmsetup table r >text/$name.table
    dmsetup suspend r
    for i in "$@"; do keep $name-$i /dev/mapper/m$i 0 16; done
    dmsetup remove r
    for i in 0 1 2 3 4 5 6 7; do dd if=/dev/zero of=/dev/mapper/m$i bs=64K count=1; done
}
raid raid1 "0 20000 raid raid1 3 0 region_size 64 2 $M/m0 $M/d0 $M/m1 $M/d1"
settle dm-raid1 0 1
raid raid5 "0 20480 raid raid5_ls 3 64 region_size 1024 3 $M/m0 $M/d0 $M/m1 $M/d1 $M/m2 $M/d2"
dmsetup suspend d1; dmsetup load d1 --table "0 30000 error"; dmsetup resume d1
dd if=/dev/zero of=/dev/mapper/r bs=4096 seek=100 count=40 oflag=direct
settle dm-raid5-failed 0 1 2
dmsetup load d1 --table "0 30000 linear $b 0"; dmsetup resume d1
raid raid6 "0 12288 raid raid6_zr 1 32 5 $M/m0 $M/d0 $M/m1 $M/d1 $M/m2 $M/d2 $M/m3 $M/d3 $M/m4 $M/d4"
settle dm-raid6 4
raid raid10 "0 20480 raid raid10 5 64 raid10_copies 2 raid10_format offset 4 $M/m0 $M/d0 $M/m1 $M/d1 $M/m2 $M/d2 $M/m3 $M/d3"
settle dm-raid10 0
raid raid0 "0 20480 raid raid0 1 64 2 $M/m0 $M/d0 $M/m1 $M/d1"
settle dm-raid0 1

# dm-mirror. The log lies on m0; a region in the middle of the second leg cannot be written. (Not with
# handle_errors: such a write would wait for a daemon.)
dmsetup create bad --table "0 8000 linear $b 0
8000 64 error
8064 20000 linear $b 8064"
dmsetup create r --table "0 20100 mirror disk 3 $M/m0 64 nosync 2 $M/d0 0 $M/bad 0"
keep mirror-nosync $M/m0 0 16
dd if=/dev/zero of=/dev/mapper/r bs=4096 seek=1001 count=1 oflag=direct
dd if=/dev/zero of=/dev/mapper/r bs=4096 seek=10 count=1 oflag=direct
sleep 1
dmsetup status r >text/mirror-failed.status; dmsetup table r >text/mirror-failed.table
dmsetup suspend --noflush r; keep mirror-failed $M/m0 0 16
dmsetup remove r
dd if=/dev/zero of=/dev/mapper/m0 bs=64K count=1
dmsetup create r --table "0 20100 mirror disk 3 $M/m0 512 sync 2 $M/d0 0 $M/d1 0"
i=0; while ! dmsetup status r | grep -q ' 40/40 ' && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done
dmsetup suspend r; dmsetup status r >text/mirror-synced.status
keep mirror-synced $M/m0 0 16
dmsetup remove r
dmsetup remove_all

# Last, since nothing goes on after it: a reshape that is under way.
clean
echo 200000 >/proc/sys/dev/raid/speed_limit_max
create -e 1.2 -l 5 -n 3 -c 64 --bitmap=none --assume-clean $a $b $c
mdadm /dev/md0 --add $d
echo 10 >/proc/sys/dev/raid/speed_limit_min; echo 10 >/proc/sys/dev/raid/speed_limit_max
timeout 5 mdadm --grow /dev/md0 -n 4
sleep 1
cat /proc/mdstat
examine reshaping $a; examine reshaping-new $d

# The same of dm-raid: other chunks, written to where there was free room.
n=4
for disk in $e $f $g; do
    dmsetup create m$n --table "0 2000 linear $disk 31000"
    dmsetup create d$n --table "0 30000 linear $disk 0"
    n=$((n+1))
done
legs="3 $M/m4 $M/d4 $M/m5 $M/d5 $M/m6 $M/d6"
echo 200000 >/proc/sys/dev/raid/speed_limit_max
raid raid5 "0 20480 raid raid5_ls 3 64 region_size 1024 $legs"
echo 10 >/proc/sys/dev/raid/speed_limit_max
dmsetup suspend r
dmsetup load r --table "0 20480 raid raid5_ls 5 32 region_size 1024 data_offset 8192 $legs"
timeout 20 dmsetup resume r
sleep 2
dmsetup status r >text/dm-raid5-reshaping-4.status
for i in 4 5; do keep dm-raid5-reshaping-$i $M/m$i 0 16; done
exit 0
